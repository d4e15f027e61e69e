-- The server's clock in whole microseconds, as the text that commands take: joined, not computed, so that no number has
-- to be formatted. No other clock is ever read or passed in (guarantee 5).
local clock = redis.call('TIME')
local now_us = clock[1] .. (#clock[2] == 6 and clock[2] or ('00000' .. clock[2]):sub(-6))
