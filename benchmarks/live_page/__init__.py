"""The server's page open beside decoding on a CPU: processor time and speed."""
