"""Writing: what a match becomes, where its inputs lie, and the edit."""
