"""The choices a user has, as data: one root file per job, one folder per choice. Found by Hydra as `pkg://conf`."""
