"""The bank: one HDF5 file with the contextual vectors of a corpus; made, resumed, read and verified here."""
