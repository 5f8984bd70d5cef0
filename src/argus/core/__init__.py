"""The words the other parts speak: plain data and errors, without I/O and without torch."""
