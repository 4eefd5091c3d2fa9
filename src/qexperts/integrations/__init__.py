"""Other projects' files and interfaces, converted to and from qexperts."""
