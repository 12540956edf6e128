"""Parts of ``tools.fuzz``, which loads damaged model files.

``forms`` has a sound model in all file forms, ``damage`` damages it, and ``truth`` says what loading should give.
"""
