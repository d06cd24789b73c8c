"""Files of models: load them without running their code, release and export them."""
