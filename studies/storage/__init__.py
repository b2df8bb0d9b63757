"""What a study leaves behind: its database, its folder, and who may write to them."""
