"""What a study's figures show, how they are drawn, and the page that holds them."""
