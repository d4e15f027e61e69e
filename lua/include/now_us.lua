-- The server's clock in whole microseconds. No other clock is ever read or passed in (guarantee 5).
local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end
