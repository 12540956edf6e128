"""The bundled model and the table of published weights: data only."""
