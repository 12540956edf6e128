"""File formats of models: safetensors files, the official layout, diffusers folders and LoRAs.

``modules`` loads and saves models; start there. ``resolve`` finds every tensor, in ``weight_files`` made of
``tensorfile``, under the names of ``layouts``, ``text_names`` and ``openclip_names``. ``folder_reader`` and
``folder_writer`` have the JSON files of a diffusers folder, ``identify`` and ``containers`` name files of other kinds.
``lora``, ``lora_names`` and ``adapters`` read LoRAs and LyCORIS, ``fp8_scales`` the scales of fp8 weights.
``published`` finds weights by name; ``atomic`` writes files.
"""
