-- One event as it is published: '<kind> <length of the sid> <length of the record> <score> <sid><record>', with the
-- connection, {sid, record, score}, as it is now or, of one that is gone or has left, as it was.
local function event(kind, connection)
  local sid, record, score = connection[1], connection[2], connection[3]
  return kind .. ' ' .. #sid .. ' ' .. #record .. ' ' .. score .. ' ' .. sid .. record
end
