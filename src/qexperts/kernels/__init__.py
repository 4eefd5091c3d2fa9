"""Device code and its launchers, one idea a file. User input has been checked by whoever calls a launcher."""
