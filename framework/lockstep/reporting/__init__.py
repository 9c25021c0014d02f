"""Reports on runs: watches, records and compares them, but never trains or evaluates."""
