"""Executable checks of the statements the library rests on, one file each; `README.md` says how to read them."""
