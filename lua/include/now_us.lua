-- The server's clock in whole microseconds, as the text that commands take: joined, not computed, so that no number has
-- to be formatted. No other clock is ever read or passed in (guarantee 5).
local function now_us()
  local time = redis.call('TIME')
  return time[1] .. string.sub('00000' .. time[2], -6)
end
