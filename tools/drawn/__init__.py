"""The drawn world of the bundled model: scenes with captions, their pictures, and a detector that reads pictures.

``world`` has scenes and captions, ``patterns`` their textures, ``painting`` draws them. ``detector`` checks a picture
against its caption with ``read_plain``, ``read_open`` and ``read_patterns``; ``regions`` finds and fits the objects.
"""
