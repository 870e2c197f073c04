"""The trainer: fine-tuning, alignment and reward models on the network that serves, in a child process a job."""
