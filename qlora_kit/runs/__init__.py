"""Run folders: read them, predict with them, write their cards and records."""
