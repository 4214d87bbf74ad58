"""The command line ``hsr``: one module per command, each imported when it is called for."""
