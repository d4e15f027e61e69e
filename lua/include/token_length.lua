-- Characters of a token: 72 random bits, so that of all calls within a minute no two have the same.
local token_length = 12
