"""Plan a conversion, calibrate, encode every tensor, and write the file."""
