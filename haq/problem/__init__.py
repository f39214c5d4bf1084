"""What is searched: a problem, what a policy of it costs, and what a policy is worth."""
