"""What recorded runs say of an experiment: tables, pictures and verdicts."""
