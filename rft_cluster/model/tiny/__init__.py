"""`model.path: tiny`: a small, real model, built and warm-started on this machine for one data set."""
