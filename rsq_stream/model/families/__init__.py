"""The families of decoders that are supported, one file each."""
