"""Import paths of earlier versions: `spinquant/__init__.py` adds this folder to the package's search path."""
