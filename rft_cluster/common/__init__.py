"""What every folder may use: errors, files, text, and how CPUs and GPUs differ. Imports nothing of ours."""
