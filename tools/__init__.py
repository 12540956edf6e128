"""Commands around the model, each run as ``python -m tools.NAME``; folders hold their parts.

``drawn`` has the drawn world of the bundled model, ``training`` trains that model, ``evaluation`` compares presets,
``benchmark`` measures time and memory, and ``fuzzing`` damages model files. Only tests import from this package.
"""
