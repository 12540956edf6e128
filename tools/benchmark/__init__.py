"""Parts of the commands that measure time and memory: ``bench``, ``bench_image``, ``scaling`` and ``memory``.

``bench_models`` builds the models, ``gauges`` measures one call in this process and ``profile_parts`` splits its time.
``processes`` runs ``worker`` in a fresh process, with the files of ``model_files``. ``machine`` describes the hardware.
"""
