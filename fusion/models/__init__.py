"""Models: the bytes of a file, the protobuf over them, and the index of its graphs."""
