"""Everything that is written: atomic files, commit records, identities, locks. Imports no torch."""
