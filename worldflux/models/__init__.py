"""World models: the common interface in `base`, one package per family."""
