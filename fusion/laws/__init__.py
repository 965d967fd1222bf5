"""The laws: what makes two spellings of one computation equal. Each module normalises, and can spell."""
