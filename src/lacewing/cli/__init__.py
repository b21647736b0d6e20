"""The command line: one module per verb, each loading the engine only when it runs."""
