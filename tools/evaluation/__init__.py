"""Parts of the commands that compare presets and draw figures.

``pictures`` makes pictures and ``rows`` stores them. ``metrics``, ``set_metrics`` and ``official_metrics`` score them.
``paired_statistics`` gives intervals, ``summaries`` makes tables and ``plots`` draws them. ``experiment_specs`` lists
the experiments and ``run_options`` the shared options. ``attention_maps`` and ``step_changes`` look inside the U-Net.
"""
