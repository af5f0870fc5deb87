"""How things run: native code that is built where it is used."""
