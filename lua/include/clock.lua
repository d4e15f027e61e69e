-- The server's clock as TIME gives it: the second, and the microsecond within it. No other clock is ever read, and no
-- time of another clock is passed in (guarantee 5).
local clock = redis.call('TIME')
