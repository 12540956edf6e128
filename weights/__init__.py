"""The bundled model, CLIP's merges and the table of published weights: data only."""
