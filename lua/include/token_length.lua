-- Characters of a token: 72 random bits, so that no two calls within a minute have the same.
local token_length = 12
