-- The server's clock in whole milliseconds, the unit of every time that is stored, as the text that commands take.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] .. string.sub('00000' .. time[2], -6, -4)
end
