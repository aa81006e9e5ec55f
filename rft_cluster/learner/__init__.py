"""The role that trains: one FSDP2 rank. Imports `model`, `weights` and `algorithm`, no other role."""
