# Nothing here is for Python: the command processor cimports it.
