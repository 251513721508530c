"""The checks of a validation: they read weights, and run code of the user. Needs torch."""
