"""The page of `worldflux report`: its content, pictures, template and style."""
