"""Banks behind the doors of other libraries: programs that know only those use banks."""
