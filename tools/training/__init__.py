"""Parts of ``tools.train_shapes``, which trains the bundled model.

``vae``, ``text`` and ``unet`` train one part each, in this order. ``batches`` draws the pictures, ``steps`` has what
the three share, and ``likeness`` starts and watches the self-attention of the U-Net.
"""
