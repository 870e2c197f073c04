"""Post-training: jobs that outlive the server, the rows that they read, and serving what they make."""
