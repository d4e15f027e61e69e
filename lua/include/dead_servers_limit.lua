-- How many dead servers one cleanup takes at most.
local dead_servers_limit = 10
