"""Training on many hosts: who they are, what they agree on, what each reads, and who watches them."""
