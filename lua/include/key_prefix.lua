-- What the keys of the namespace begin with. What the keys tell is not passed again as an argument.
-- Reads its includer's last_seen_key.
local key_prefix = last_seen_key:sub(1, -#'last_seen' - 1)
