-- The server's clock as it tells it: the second, and the microsecond of it. No other clock is ever read, and no time of
-- one passed in (guarantee 5).
local clock = redis.call('TIME')
