"""Executable checks of the statements the library rests on, one file per statement; `README.md` says how to read them."""
